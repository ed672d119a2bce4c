"""Notifications: the outbox, its delivery workers, the HTTP client with its address guard, the receivers."""
