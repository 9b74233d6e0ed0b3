"""The paper's analyses of what training does to a projector."""
