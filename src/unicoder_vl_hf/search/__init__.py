"""What finds, once something is trained: encoders, indexes, search in two stages."""
