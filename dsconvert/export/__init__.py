"""Write the float and the converted network as ONNX files, and check them before they are saved."""
