"""How the embedded model was made. Kept in the repository, left out of wheels."""
