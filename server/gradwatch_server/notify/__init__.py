"""Notifications: the outbox, the workers that deliver it, the HTTP client with its address guard, the receivers."""
