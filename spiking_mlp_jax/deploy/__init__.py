"""From a trained network to integers without multiplications: fold, quantize, run, audit, export."""
