"""Ingestion: admits batches, validates them, diagnoses their samples and stores them in one transaction."""
