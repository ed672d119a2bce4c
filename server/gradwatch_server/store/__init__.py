"""The database: schema, migrations, roll-ups, queries, retention and deletion of runs, tokens."""
