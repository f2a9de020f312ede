"""The page itself: NiceGUI on top of the service."""
