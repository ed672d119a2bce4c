#!/bin/sh
# Makes the role that Grafana reads with: it sees every table, present and to come, and changes none.
set -eu
psql -v ON_ERROR_STOP=1 -v password="$GRADWATCH_READER_PASSWORD" -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
CREATE ROLE gradwatch_reader LOGIN PASSWORD :'password';
ALTER ROLE gradwatch_reader SET default_transaction_read_only = on;
ALTER ROLE gradwatch_reader SET statement_timeout = '30s';
ALTER ROLE gradwatch_reader SET jit = off; -- the planner overestimates rows, and would compile each query of a board
GRANT USAGE ON SCHEMA public TO gradwatch_reader;
GRANT SELECT ON ALL TABLES IN SCHEMA public TO gradwatch_reader;
ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT SELECT ON TABLES TO gradwatch_reader;
SQL
