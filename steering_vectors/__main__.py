"""``python -m steering_vectors`` runs the demo."""

from steering_vectors.demo import main

if __name__ == "__main__":
    main()
