#!/bin/sh
# Run once by the postgres image, on an empty data folder: a role and a database each for maskfleet and Label Studio.
# Neither role can enter the other's database, and neither is a superuser.
set -eu
# Read here, because psql would go on with an empty password where a file cannot be read.
maskfleet_password=$(cat /run/secrets/database-password)
label_studio_password=$(cat /run/secrets/label-studio-database-password)
export maskfleet_password label_studio_password
psql --no-psqlrc --set=ON_ERROR_STOP=1 --username="${POSTGRES_USER:-postgres}" <<'SQL'
\getenv maskfleet_password maskfleet_password
\getenv label_studio_password label_studio_password
CREATE ROLE maskfleet LOGIN PASSWORD :'maskfleet_password';
CREATE ROLE label_studio LOGIN PASSWORD :'label_studio_password';
CREATE DATABASE maskfleet OWNER maskfleet;
CREATE DATABASE label_studio OWNER label_studio;
REVOKE CONNECT, TEMPORARY ON DATABASE maskfleet, label_studio FROM PUBLIC;
SQL
