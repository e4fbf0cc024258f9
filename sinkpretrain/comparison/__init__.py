"""Results and runs beside each other: what is read, the numbers, the sections of the page, and how they are written."""
