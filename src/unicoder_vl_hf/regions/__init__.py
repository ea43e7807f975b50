"""
Regions of images: stores of records, the foreign formats that they are read from, and the detectors that find them.
"""
