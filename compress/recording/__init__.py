"""One pass over the calibration data: features and outputs of every layer as moments, in bounded memory."""
