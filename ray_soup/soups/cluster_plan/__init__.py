"""Plans for clusters that need not exist: from a table of device figures, or from what is measured on this machine.

Does not import Ray.
"""
