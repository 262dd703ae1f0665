"""The task of a soup: its model, data and loss, and the outcomes of evaluation. May import recipe, io and mixing."""
