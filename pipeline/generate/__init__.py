"""What training a generator of images needs besides the networks: latents, figures of merit, pictures, speed."""
