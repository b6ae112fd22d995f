"""A conversation goes in; its text comes out, with the trained characters and their proof."""
