"""Images -> a pre-trained backbone."""
