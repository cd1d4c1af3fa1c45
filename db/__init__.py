"""What is remembered: settings, tables, sessions, every SQL statement, migrations. Imports no other room."""
