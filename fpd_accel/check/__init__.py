"""Quality checks of prepared data: skeleton, labels, and the evaluation of the labels themselves."""
