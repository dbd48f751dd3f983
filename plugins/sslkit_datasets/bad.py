"""What is wrong with an image, in words."""


class BadImageError(Exception):
    """An image that cannot be read; the text completes the sentence "this image ..."."""


TOO_MUCH = "takes more memory than there is"
"""What is wrong with an image whose pixels there is no room for."""
