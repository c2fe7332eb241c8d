"""Networks to read about before anything is built: the family as a list, one network as a sheet and as a drawing."""
