"""The text of every named configuration, so that a review sees each changed default."""
