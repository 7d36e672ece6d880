"""What a data set would teach: statistics as pure functions over rows, findings drawn from them, and a page."""
