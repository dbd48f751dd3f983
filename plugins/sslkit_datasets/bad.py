"""What is wrong with an image, in words."""


class BadImageError(Exception):
    """An image that cannot be read; the text completes the sentence "this image ..."."""
