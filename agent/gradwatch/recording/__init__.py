"""Recording the norms of one step into buffers, without waiting for the device."""
