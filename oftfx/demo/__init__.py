"""Real models end to end: a 4-bit language model (`job`), a convolution network that reads words (`ocr_job`)."""
