"""Small sets made from nothing: digits on photographs, digits in folders."""
