"""The offline demonstration: both stages on data and a teacher that ship with the project."""
