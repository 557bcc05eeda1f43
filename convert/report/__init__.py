"""`slicecast report`: one page that tells somebody who was not there what a conversion did."""
