"""What a run takes and how to set it: settings that fit a GPU, time and cost, advice with its formula, rates."""
