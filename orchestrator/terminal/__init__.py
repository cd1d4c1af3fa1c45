"""What people see in a terminal. Everything here only reads."""
