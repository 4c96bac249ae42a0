"""Compiling a train step for machines one does not have: does it fit, and what does it cost?"""
