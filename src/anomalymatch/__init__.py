"""Find the rare things in enormous sets of images, starting from about five examples."""
