from django.urls import path

from shop import views

urlpatterns = [
    path("orders", views.place_order),
    path("register", views.register),
    path("jobs/<str:job_id>", views.show_job),
    path("count", views.count_jobs),
]
