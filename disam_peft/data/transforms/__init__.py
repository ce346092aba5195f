"""From the bytes of an image file to normalised pixels, one image or a whole batch at a time."""
