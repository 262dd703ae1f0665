"""Reports for people: statistics, tables, figures, the HTML page and the model card.

May import recipe, mixing and task. `statistics` and `tables` do not import torch.
"""
