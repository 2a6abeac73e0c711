"""Records in MLflow. The one importer of MLflow."""
