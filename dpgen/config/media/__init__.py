"""Check the keys about images, audio and video."""
