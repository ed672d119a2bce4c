"""What several ranks of one training know together."""
