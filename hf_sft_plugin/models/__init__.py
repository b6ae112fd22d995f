"""A model goes in; it comes out so that each row runs alone and answers with its loss."""
