"""Web page of the labelling service, built with NiceGUI."""
