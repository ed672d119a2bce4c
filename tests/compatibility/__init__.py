"""What agents and servers of each version say to each other, recorded as it was sent."""
