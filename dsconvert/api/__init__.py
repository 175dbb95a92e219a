"""The Python API, which `import dsconvert` offers."""
