"""Nine users: from the ordinary training script of their library to the soup loaded there, with the same figure."""
