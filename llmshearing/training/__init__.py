"""One run of training: source, model, optimizer and callbacks around the Composer trainer."""
