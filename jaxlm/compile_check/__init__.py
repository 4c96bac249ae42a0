"""Compiling a train step for machines that are not here: does it fit, and what does it cost?"""
