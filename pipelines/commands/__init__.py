"""The commands of `mind-atlas`, by what a person wants to do."""
