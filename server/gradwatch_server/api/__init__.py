"""The HTTP interface: authorisation, request bodies, problem documents, OpenAPI; the routes stand in ``routes/``."""
