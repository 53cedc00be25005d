"""What is in a directory or a file, read from headers and notes: no model is made, nothing is unpickled."""
