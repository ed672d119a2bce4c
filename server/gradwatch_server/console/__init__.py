"""Commands that speak to a server, one module each."""
