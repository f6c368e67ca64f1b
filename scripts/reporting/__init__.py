"""What the report and the experiments share: runs read and grouped, tables, figures."""
